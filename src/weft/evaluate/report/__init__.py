"""Reports: contestants beside each other, with errors, paired tests, flips, costs and forgetting.

``sources`` finds folders, ``sheet`` lays all answers on one sheet, ``comparison`` tests them, ``report`` holds the
whole, ``writing`` writes it.
"""
