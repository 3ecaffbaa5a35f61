"""What README.md and the pages of docs/ state about the code."""
