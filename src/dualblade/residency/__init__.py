"""Pure decisions: budget and geometry in, a residency plan out."""

from dualblade.residency.plan import (
    BudgetShares,
    Placement,
    ResidencyPlan,
    UnitDemand,
    plan_by_size,
    plan_fixed,
)

__all__ = [
    "BudgetShares",
    "Placement",
    "ResidencyPlan",
    "UnitDemand",
    "plan_by_size",
    "plan_fixed",
]
