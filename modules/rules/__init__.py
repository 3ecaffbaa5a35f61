"""Rules of compatibility, and what they check."""
