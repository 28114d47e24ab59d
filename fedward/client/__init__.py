"""The hospital's side: agent (messages, policy, session) and trainer (data, model)."""
