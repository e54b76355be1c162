"""Carries plans out in a Kubernetes cluster: a replica is a pod, on a GPU of the plan's choice.

Read `config` and `marks` (the words), `inventory` and `replicas` (what there is, from Kubernetes' objects), `pods` and
`claims` (objects from plans; all of these are pure), then `api`, `cache` and `lease` (how the API server is spoken to),
and `actuator`, which puts them together. Nothing outside of this folder knows Kubernetes.
"""
