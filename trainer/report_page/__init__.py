"""The page of a run: curves, tables, pictures, cost and configuration in one HTML file."""
