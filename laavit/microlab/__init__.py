"""The embedded experiment: procedural scenes with known boxes, questions about them, a tiny teacher and a tiny student."""
