"""What a training costs, before it: parameters, memory, speed and communication on devices that need not be there.

    costs = costs_of(load_recipe("nano"), torch.bfloat16)
    plan(costs, gpus=8, pace=Sheet(costs, device_named("h100"), mfu=0.3)).best.hours(costs.recipe)

Nothing runs for it but single layers on a few tokens, and `measured`, which times pieces of the training here.
"""

from atma.plan.costs import Costs, costs_of
from atma.plan.devices import DEVICES, HERE, Device, device_named
from atma.plan.estimate import Option, Plan, plan, rows
from atma.plan.here import measured
from atma.plan.memory import Held, held
from atma.plan.meshes import Mesh, meshes, sent
from atma.plan.paces import ASSUMED_MFU, Measured, Pace, Pieces, Sheet

__all__ = [
    "ASSUMED_MFU",
    "DEVICES",
    "HERE",
    "Costs",
    "Device",
    "Held",
    "Measured",
    "Mesh",
    "Option",
    "Pace",
    "Pieces",
    "Plan",
    "Sheet",
    "costs_of",
    "device_named",
    "held",
    "measured",
    "meshes",
    "plan",
    "rows",
    "sent",
]
