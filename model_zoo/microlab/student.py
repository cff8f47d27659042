"""The micro-lab's student: python -m laavit.microlab.pretrain model_zoo/microlab/student.py --out DIR.

Stopped early on purpose: it answers in the right words and format, and has learned little of the questions that need
a search. Longer training on answers alone (400 steps, 6000 scenes) reaches .75 and leaves nothing to gain on half of
the kinds.
"""

name = "student"
seed = 0
validation = 150
sizes = dict(text_width=96, text_layers=3, text_heads=4, vision_width=64, vision_layers=3, vision_heads=4)
vision = dict(steps=500, batch_size=32, lr=2e-3, scene_seed=2)
answers = dict(
    scenes=2000,
    scene_seed=11,
    steps=150,
    batch_size=24,
    lr=2e-3,
    decay=0.3,
    grounding=0.0,  # answers alone
)
