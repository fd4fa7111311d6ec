"""A small EndpointPickerConfig."""

from __future__ import annotations

EPP = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: queue-scorer}, {type: PREFIX}, {type: max-score-picker}, {type: single-profile-handler}]
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 1}
  - {pluginRef: PREFIX, weight: 2}
  - pluginRef: max-score-picker
"""
