"""The user's data run through the user's model, and what is learnt of its layers meanwhile."""
