"""What a dashboard shows, collected in one pass over the corpus."""
