"""The micro-lab's student: python -m laavit.microlab.pretrain model_zoo/microlab/student.py --out DIR.

Trained on answers alone: it knows the words and the comparisons (relation, depth, reflectance), and is weak where the
object has to be searched for first (colour, shape).
"""

name = "student"
seed = 0
validation = 150
sizes = dict(text_width=96, text_layers=3, text_heads=4, vision_width=64, vision_layers=3, vision_heads=4)
vision = dict(steps=500, batch_size=32, lr=2e-3, scene_seed=2)
answers = dict(
    scenes=6000,
    scene_seed=11,
    steps=400,
    batch_size=24,
    lr=2e-3,
    decay=0.3,
    grounding=0.0,  # answers alone
)
