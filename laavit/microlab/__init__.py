"""The embedded experiment: procedural scenes with known boxes, questions, a tiny teacher and a tiny student."""
