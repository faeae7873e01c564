"""Importing this module registers normkit's estimators with verl (VERL_USE_EXTERNAL_MODULES)."""

from normkit.integrations.verl import register

register()
