"""HTML feature dashboards, imported as `saelab.dashboards`. Nothing is here yet."""
