"""Codecs: what a tensor becomes on the wire. One codec a file, found through one registry."""
