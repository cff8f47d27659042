"""The control's teacher: python -m laavit.microlab.pretrain model_zoo/microlab/teacher_ungrounded.py --out DIR."""

_base_ = ["./teacher.py"]

answers = dict(grounding=0.0)  # on answers alone, as the student
