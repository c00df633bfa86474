"""From scores to draws: the estimator as pure functions around one state."""
