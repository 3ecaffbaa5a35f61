"""Budget: the target, how it is measured, the regulariser that holds it, and its schedule over training."""

from .budget import Budget, BudgetConfig, BudgetLoss

__all__ = ["Budget", "BudgetConfig", "BudgetLoss"]
