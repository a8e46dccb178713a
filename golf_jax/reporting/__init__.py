"""What runs left behind, shown and compared: figures, tables, one page."""
