"""The ground floor: what every room stands on, and which stands on none of them."""
