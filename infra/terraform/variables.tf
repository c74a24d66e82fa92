variable "name" {
  description = "Beginning of the roles' names."
  type        = string
  default     = "jepa"
}

variable "raw_bucket" {
  description = "Existing bucket with the source videos; nothing here may write to it."
  type        = string
}

variable "runs_bucket" {
  description = "Bucket to make, for catalog/, shards/ and runs/."
  type        = string
}

variable "oidc_provider_arn" {
  description = "OIDC provider of the Kubernetes cluster, for roles of service accounts."
  type        = string
}

variable "namespace" {
  description = "Namespace of the service accounts."
  type        = string
  default     = "jepa"
}

variable "service_accounts" {
  description = "Service account that may take each role."
  type        = map(string)
  default = {
    ingest    = "jepa-ingest"
    normalise = "jepa-normalise"
    tidy      = "jepa-tidy"
    train     = "jepa-run"
    read      = "jepa-read"
  }
}

variable "keep_deleted_days" {
  description = "Days for which deleted objects can be brought back."
  type        = number
  default     = 14
}
