"""Pure decisions: budget, geometry and measured speeds in, a residency plan out."""

from dualblade.residency.controller import Controller, ControlPolicy
from dualblade.residency.events import Cause, Event, Observation, after
from dualblade.residency.plan import (
    BudgetShares,
    Placement,
    PlanInputs,
    ResidencyPlan,
    UnitDemand,
    decide,
    plan_by_size,
    plan_fixed,
    resized,
)
from dualblade.residency.speeds import DoorSpeeds, StepTime, predict

__all__ = [
    "BudgetShares",
    "Cause",
    "ControlPolicy",
    "Controller",
    "DoorSpeeds",
    "Event",
    "Observation",
    "Placement",
    "PlanInputs",
    "ResidencyPlan",
    "StepTime",
    "UnitDemand",
    "after",
    "decide",
    "plan_by_size",
    "plan_fixed",
    "predict",
    "resized",
]
