"""Control: the header and the answer follow the teacher's gaze; no latents, no gate."""

_base_ = ["../lavit/lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=dict(_delete_=True, name="trajectory_no_latents"))
prompt = dict(system="")
