"""One shell, style and escape for every page that saelab writes."""
