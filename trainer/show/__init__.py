"""Pictures and pages of kept tokens."""
