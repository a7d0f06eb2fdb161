{{/* The names in the cluster are fixed: sidecars, the injector and the control
plane know each other by them. One installation a cluster. */}}
{{- define "outrigger.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: outrigger
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ regexReplaceAll "[^A-Za-z0-9_.-]" (.root.Chart.AppVersion | replace "+" "_") "" | trunc 63 | trimAll "-_." | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* What selects pods must never change, so it has no version. */}}
{{- define "outrigger.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: outrigger
{{- end }}

{{- define "outrigger.image" -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end -}}
{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .root.Values.image.tag | default (.root.Chart.AppVersion | replace "+" "_") }}{{ end }}
{{- end }}

{{- define "outrigger.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Who may run what, for the parts that need nothing of their node. */}}
{{- define "outrigger.restricted.pod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "outrigger.restricted.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Placement: the values that every part has. */}}
{{- define "outrigger.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "outrigger.nativeSidecars" -}}
{{- if eq (toString .Values.injector.nativeSidecars) "auto" -}}
{{- semverCompare ">=1.29.0-0" .Capabilities.KubeVersion.Version -}}
{{- else -}}
{{- .Values.injector.nativeSidecars -}}
{{- end -}}
{{- end }}
