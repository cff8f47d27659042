"""Control: the header and the answer follow the annotated boxes; no latents, no gate, no teacher in the loss."""

_base_ = ["../lavit/lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=dict(_delete_=True, name="box_no_latents"))
prompt = dict(system="")
