/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * For bench/swap.py, appended to the unit: judges sources at random and counts how long each
 * verdict took, and the verdicts that neither of the two sets gives.
 */

BPF_TABLE_PINNED("array", u32, struct address, bench_sources, 1, PIN_DIR "/bench_sources");
BPF_TABLE_PINNED("array", u32, u64, bench_latency, 1, PIN_DIR "/bench_latency");
BPF_TABLE_PINNED("array", u32, u64, bench_outcome, 1, PIN_DIR "/bench_outcome");

enum outcome { OUTCOME_FIRST, OUTCOME_SECOND, OUTCOME_MIXED };

int bench_swap(struct xdp_md *ctx)
{
	u32 index = bpf_get_prandom_u32() & 0xffff, odd = index & 1, bucket, outcome;
	struct address *source = bench_sources.lookup(&index);
	struct scratch *s = begin();
	struct verdict v;
	u64 took, *total;

	if (!s || !source)
		return XDP_ABORTED;
	s->packet.source = *source;
	s->packet.ipv4 = is_mapped(source);
	s->packet.port = 1080;
	took = bpf_ktime_get_ns();
	v = verdict(s, CHARGE_NONE);
	took = bpf_ktime_get_ns() - took;

	/* The first set drops the even and allows the odd, the second rejects all; nobody is left to the default. */
	outcome = v.stage == STAGE_RULE && v.action == ACTION_REJECT	       ? OUTCOME_SECOND :
		  v.stage == STAGE_RULE && v.action == (odd ? ACTION_ALLOW : ACTION_DROP) ? OUTCOME_FIRST :
											    OUTCOME_MIXED;
	total = bench_outcome.lookup(&outcome);
	if (total)
		(*total)++;
	bucket = took < 16384 ? took / 16 : 1024 + (highest_bit(took) & 63); /* steps of 16 ns, then powers of two */
	total = bench_latency.lookup(&bucket);
	if (total)
		(*total)++;
	return XDP_PASS;
}
