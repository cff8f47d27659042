"""The hops' student of 3 layers: python -m laavit.microlab.pretrain model_zoo/microlab/hops/student_3.py --out DIR.

Trained on answers alone, with the shipped student's tower: it has seen every word of the questions of several hops, and
never such a question.
"""

_base_ = ["../student.py"]

name = "hops/student_3"
kinds = ("colour", "shape", "relation")
vision = dict(path="zoo:microlab/student")
answers = dict(scenes=3000, steps=300, batch_size=12)
