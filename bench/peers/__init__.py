"""Other libraries doing the same work, each in an environment of its own (`make bench-peers`).

Modules here import the library they are named after when a job starts, and nothing of Vesalius.
"""
