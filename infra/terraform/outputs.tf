output "roles" {
  description = "ARN of each role, for the annotation eks.amazonaws.com/role-arn of its service account."
  value       = { for name, role in aws_iam_role.verb : name => role.arn }
}
