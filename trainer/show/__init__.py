"""Pictures and pages of which tokens were kept."""
