"""Backends behind one protocol, `backend`; `registry` lists them."""
