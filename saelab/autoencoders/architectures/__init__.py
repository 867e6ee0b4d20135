"""The architectures, one file each: what differs of scores, allocation, selection and losses."""
