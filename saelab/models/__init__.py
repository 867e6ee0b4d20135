"""Where vectors come from: language models, and the sites of any module."""
