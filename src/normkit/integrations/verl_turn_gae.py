"""Importing this module is importing the plugin, and makes verl's "gae" credit turns.

For VERL_USE_EXTERNAL_MODULES, in place of :mod:`normkit.integrations.verl_plugin`.
"""

from normkit.integrations.verl import credit_turns_by_gae

credit_turns_by_gae()
