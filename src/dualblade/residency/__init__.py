"""Pure decisions: budget, geometry and measured speeds in, a residency plan out."""

from dualblade.residency.controller import Controller, ControlPolicy, Lessons
from dualblade.residency.events import Cause, Event, Move, Observation, after
from dualblade.residency.ladder import WHOLE, Ladder, Level, UnitDemand
from dualblade.residency.plan import (
    BudgetShares,
    Placement,
    PlanInputs,
    ResidencyPlan,
    decide,
    plan_fixed,
)
from dualblade.residency.speeds import DoorSpeeds, StepTime, predict, worth_caching

__all__ = [
    "WHOLE",
    "BudgetShares",
    "Cause",
    "ControlPolicy",
    "Controller",
    "DoorSpeeds",
    "Event",
    "Ladder",
    "Lessons",
    "Level",
    "Move",
    "Observation",
    "Placement",
    "PlanInputs",
    "ResidencyPlan",
    "StepTime",
    "UnitDemand",
    "after",
    "decide",
    "plan_fixed",
    "predict",
    "worth_caching",
]
