"""What was collected, as chunks, tables and files."""
