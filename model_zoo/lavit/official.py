"""The authors' released code as far as settings go: two hard stages, last 8 layers, pooled V_sem, their features.

Their stages are two runs; here they are one, closed for 0.4 of it (the code does not say how long). Not the same on
purpose: their trajectory loss compares a learned product of states at the wrong positions with a map of sum 54 or more
(here: attention, and a distribution), their mask leaks labels (and closes the question's path as an option, which is
taken here), and their latents are not followed by a separator.
"""

_base_ = ["./lavit.py"]

student = dict(max_pixels=4_194_304)
data = dict(
    _delete_=True, name="lavit_15k", annotations="LaViT-15k/lavit_15k_for_training.json", root="LaViT-15k/data/images"
)
teacher = dict(_delete_=True, name="lavit_15k", root="LaViT-15k")  # what they published, read and not computed again
latents = dict(_delete_=True, name="emitted", count=4)  # with a cross-entropy, written by the model
prompt = dict(system="")  # the template's own
gate = dict(_delete_=True, name="livr", warmup=0.4)
targets = dict(concept=dict(pooling="mean"), trajectory=dict(top_k=None))
extract = dict(layers="last 8", semantics="mean", repetition_penalty=1.05, max_new_tokens=4096)
filters = dict(_delete_=True)  # their samples are filtered already
traces = dict(path="runs/official/traces", select=())
train = dict(weight_decay=0.1)
