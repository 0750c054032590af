"""Pure decisions: budget, geometry and measured speeds in, a residency plan out."""

from dualblade.residency.plan import (
    BudgetShares,
    Placement,
    PlanInputs,
    ResidencyPlan,
    UnitDemand,
    decide,
    plan_by_size,
    plan_fixed,
)
from dualblade.residency.speeds import DoorSpeeds, StepTime

__all__ = [
    "BudgetShares",
    "DoorSpeeds",
    "Placement",
    "PlanInputs",
    "ResidencyPlan",
    "StepTime",
    "UnitDemand",
    "decide",
    "plan_by_size",
    "plan_fixed",
]
