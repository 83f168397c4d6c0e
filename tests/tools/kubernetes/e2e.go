//go:build tools

// Package tools names what is built as a test, and so is no tool for the go command: Kubernetes' end-to-end suite.
package tools

import _ "k8s.io/kubernetes/test/e2e"
