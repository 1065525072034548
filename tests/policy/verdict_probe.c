/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * For tests and benchmarks, appended to the unit that is tested: it makes the whole verdict visible, where the hooks
 * only act on it. Run with BPF_PROG_TEST_RUN.
 */

struct probe_result {
	struct verdict verdict;
	struct packet packet;
	u32 kind;
};

/* Judges a frame, and puts a probe_result before it. Returns XDP_TX, or XDP_ABORTED if there was no room. */
int probe_frame(struct xdp_md *ctx)
{
	struct probe_result result = {};
	struct scratch *s = begin();
	void *data;

	if (!s)
		return XDP_ABORTED;
	result.kind = parse_frame((void *)(long)ctx->data, (void *)(long)ctx->data_end, &s->packet);
	if (result.kind == PACKET_TCP)
		result.verdict = verdict(s, CHARGE_NONE);
	result.packet = s->packet;
	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(result)))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	if (data + sizeof(result) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(data, &result, sizeof(result));
	return XDP_TX;
}
