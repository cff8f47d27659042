"""Micro-lab, the study's first half: Table 3 of LaViT (arXiv 2601.10129) on the CPU, its rivals, and the arms that
separate causes. Five seeds, each with a student of its own initialisation; 16 evaluated rows.

Settings were chosen on the validation split (batches of 8 scenes give what 16 do, at half the cost); every figure is of
the test split.
"""

name = "microlab_table3"
title = "The micro-lab's Table 3 and the arms that separate causes"
base = "../naive_sft.py"
out = "runs/study/table3"
reference = "naive_sft"
seeds = [0, 1, 2, 3, 4]
per_seed = {"student.path": "runs/study/students/{seed}"}
overrides = {
    "train.batch_size": 8,
    "train.shared_prefix": True,
    "train.checkpoint_every": 0,
    "train.tensorboard": False,
}
evaluate = dict(tasks=["microlab_test"], data_root="runs/demo/data/eval", batch_size=64, latents=["on"])
arms = dict(
    base=dict(model="runs/study/students/{seed}", label="before training"),
    naive_sft=dict(recipe="../naive_sft.py", label="Naive SFT"),
    lavit=dict(recipe="../lavit.py", label="LaViT", latents=["on", "off"]),
    no_trajectory=dict(recipe="../no_trajectory.py", label="without trajectory"),
    no_concept=dict(recipe="../no_concept.py", label="without concept"),
    hard_gate=dict(recipe="../hard_gate.py", label="hard gate"),
    single_stage=dict(recipe="../single_stage.py", label="single stage (open gate)"),
    pause=dict(recipe="../pause.py", label="pause tokens"),
    logits_kd=dict(recipe="../logits_kd.py", label="logits KD"),
    shuffled=dict(recipe="../shuffled.py", label="shuffled targets"),
    random=dict(recipe="../random.py", label="random targets"),
    ungrounded=dict(recipe="../ungrounded.py", label="ungrounded teacher"),
    box=dict(recipe="../box.py", label="boxes as gaze", latents=["on", "off"]),
    gaze_no_latents=dict(recipe="../gaze_no_latents.py", label="gaze on own rows, no latents"),
    box_no_latents=dict(recipe="../box_no_latents.py", label="boxes on own rows, no latents"),
    question_first=dict(recipe="../question_first.py", label="question-first semantics"),
)
_extract = "laavit extract zoo:microlab"
before = [
    "laavit microlab runs/demo/data",
    [
        dict(
            run="python -m laavit.microlab.pretrain zoo:microlab/student.py --seed {seed} --tower zoo:microlab/student"
            " --out runs/study/students/{seed}",
            creates="runs/study/students/{seed}/hashes.json",
        ),
        dict(
            run="python -m laavit.microlab.pretrain zoo:microlab/teacher_ungrounded.py --out runs/ungrounded/teacher",
            creates="runs/ungrounded/teacher/hashes.json",
            arms=["ungrounded"],
        ),
    ],
    [
        f"{_extract}/lavit.py",
        dict(run=f"{_extract}/logits_kd.py", arms=["logits_kd"]),
        dict(run=f"{_extract}/ungrounded.py", arms=["ungrounded"]),
        dict(
            run=f"{_extract}/lavit.py --extract.prompt_order question_first --traces.path runs/question_first/traces",
            arms=["question_first"],
        ),
    ],
]
