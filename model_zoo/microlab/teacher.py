"""The micro-lab's teacher: python -m laavit.microlab.pretrain model_zoo/microlab/teacher.py --out DIR."""

name = "teacher"
seed = 0
validation = 150
sizes = dict(text_width=128, text_layers=3, text_heads=4, vision_width=64, vision_layers=3, vision_heads=4)
vision = dict(steps=500, batch_size=32, lr=2e-3, scene_seed=1)
answers = dict(
    scenes=18000,
    scene_seed=10,
    steps=1600,
    batch_size=24,
    lr=2e-3,
    decay=0.3,
    grounding=0.3,  # weight of KL(boxes || gaze); without it the gaze is hardly localised
    layers=(-2, -1),
)
