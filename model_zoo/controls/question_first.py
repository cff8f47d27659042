"""Control: the teacher reads the question before the image, so that its image states can depend on it."""

_base_ = ["../lavit/lavit.py"]

extract = dict(prompt_order="question_first")
traces = dict(path="runs/question_first/traces")
