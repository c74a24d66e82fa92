# Buckets, and a role for each kind of verb that may do what the verb does and nothing else (policies/*.json.tftpl).
# Use as a module: source = ".../infra/terraform", raw_bucket = "...", runs_bucket = "...", oidc_provider_arn = module.eks.oidc_provider_arn.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.40, < 7.0"
    }
  }
}

locals {
  oidc_url = regex("oidc-provider/(.*)$", var.oidc_provider_arn)[0]
  roles = {
    ingest    = "ingest: reads the source, writes the catalog"
    normalise = "normalise: reads the source, writes shards"
    tidy      = "catalog compact and vacuum: the only role that deletes from a catalog"
    train     = "pretrain, sweep, post-train, evaluate: reads source and catalog, writes runs"
    read      = "catalog show, report, run ledger: reads catalog and runs"
  }
}

resource "aws_s3_bucket" "runs" {
  bucket = var.runs_bucket
}

resource "aws_s3_bucket_versioning" "runs" {
  bucket = aws_s3_bucket.runs.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_public_access_block" "runs" {
  bucket                  = aws_s3_bucket.runs.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "runs" {
  bucket = aws_s3_bucket.runs.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "aws:kms"
    }
    bucket_key_enabled = true
  }
}

# Checkpoints are replaced all the time: versions of what was deleted, and uploads that a kill has cut, do not stay.
resource "aws_s3_bucket_lifecycle_configuration" "runs" {
  bucket     = aws_s3_bucket.runs.id
  depends_on = [aws_s3_bucket_versioning.runs]
  rule {
    id     = "leftovers"
    status = "Enabled"
    filter {}
    expiration {
      expired_object_delete_marker = true
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
    noncurrent_version_expiration {
      noncurrent_days = var.keep_deleted_days
    }
  }
}

resource "aws_s3_bucket_policy" "runs" {
  bucket     = aws_s3_bucket.runs.id
  depends_on = [aws_s3_bucket_public_access_block.runs]
  policy     = templatefile("${path.module}/policies/bucket.json.tftpl", { bucket = var.runs_bucket })
}

resource "aws_iam_role" "verb" {
  for_each           = local.roles
  name               = "${var.name}-${each.key}"
  description        = each.value
  assume_role_policy = templatefile("${path.module}/policies/trust.json.tftpl", { provider = var.oidc_provider_arn, url = local.oidc_url, namespace = var.namespace, account = var.service_accounts[each.key] })
}

resource "aws_iam_role_policy" "verb" {
  for_each = local.roles
  name     = "s3"
  role     = aws_iam_role.verb[each.key].id
  policy   = templatefile("${path.module}/policies/${each.key}.json.tftpl", { raw = var.raw_bucket, runs = var.runs_bucket })
}
