{{- define "lorakeet.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "lorakeet.labels" -}}
app.kubernetes.io/name: lorakeet
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "lorakeet.secret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "lorakeet.name" .)) }}
{{- end }}

{{- /* The pod of a server. Arguments: root, and the values of `single` or `servers`. */ -}}
{{- define "lorakeet.pod" -}}
{{- $root := .root -}}
{{- $settings := $root.Values.settings -}}
metadata:
  labels:
    {{- include "lorakeet.labels" $root | nindent 4 }}
    app.kubernetes.io/component: server
spec:
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  # Otherwise a Service `lorakeet` sets LORAKEET_PORT=tcp://... in the environment.
  enableServiceLinks: false
  # SIGTERM drains: open streams can finish.
  terminationGracePeriodSeconds: {{ add (int ($settings.drain_seconds | default 30)) 15 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: lorakeet
      image: "{{ $root.Values.image.repository }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}"
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        - name: http
          containerPort: 8000
      env:
        {{- range $name, $value := $settings }}
        - name: LORAKEET_{{ upper $name }}
          value: {{ ternary ($value | toString) ($value | toJson) (kindIs "string" $value) | quote }}
        {{- end }}
        {{- with $root.Values.objectStore.url }}
        - name: LORAKEET_ADAPTER_STORE
          value: {{ . | quote }}
        {{- end }}
        {{- if or $root.Values.apiKeys.existingSecret $root.Values.apiKeys.keys }}
        - name: LORAKEET_API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "lorakeet.secret" $root }}
              key: api-keys
        {{- end }}
      {{- with $root.Values.objectStore.credentialsSecret }}
      envFrom:
        - secretRef:
            name: {{ . }}
      {{- end }}
      # The first start downloads the model before the server listens.
      startupProbe:
        httpGet:
          path: /health
          port: http
        periodSeconds: 5
        failureThreshold: 360
      # The container must not be killed while its engine is loading or restarting.
      livenessProbe:
        httpGet:
          path: /health
          port: http
        periodSeconds: 15
        timeoutSeconds: 5
      readinessProbe:
        httpGet:
          path: /ready
          port: http
        periodSeconds: 5
        timeoutSeconds: 5
      {{- $resources := deepCopy .values.resources }}
      {{- if $root.Values.gpu.count }}
      {{- $gpu := dict $root.Values.gpu.resource $root.Values.gpu.count }}
      {{- $resources = mergeOverwrite (dict) $resources (dict "limits" (merge (deepCopy (get $resources "limits" | default dict)) $gpu)) }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: data
          mountPath: /data
        - name: cache
          mountPath: /cache
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
