public import GuestPrograms

/// Where a boot plan comes from.
public enum BootSource: Sendable {
    /// A boot sector or a kernel, read from a file.
    case plan(BootPlan)
    /// A built-in guest; its image depends on the machine, so the plan is made when that stands.
    case guest(GuestProgram)

    /// - Throws: `GuestProgramError` when the guest does not fit the machine.
    func plan(layout: RAMLayout, cpuCount: Int, tscKilohertz: UInt64) throws(GuestProgramError) -> BootPlan {
        switch self {
        case .plan(let plan): return plan
        case .guest(let program):
            let image = try program.image(
                memoryBytes: layout.byteCount, lowMemoryBytes: layout.lowBytes, cpus: cpuCount,
                tscKilohertz: tscKilohertz)
            return BootPlan(
                segments: image.segments.map { BootPlan.Segment(address: $0.physicalAddress, bytes: $0.bytes[...]) },
                cpu: .protected32(entry: UInt32(image.entryAddress), ebx: 0))
        }
    }
}
