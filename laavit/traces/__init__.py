"""What a teacher left behind: gaze mathematics, grids, the store, and the filters over it.

Nothing is imported here, so that the pure functions cost neither ``datasets`` nor the filters.
"""
