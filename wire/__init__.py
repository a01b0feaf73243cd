"""How bytes and tensors cross the link."""
