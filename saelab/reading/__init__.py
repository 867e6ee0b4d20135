"""The way of the data: corpus, harvest, buffer, store."""
