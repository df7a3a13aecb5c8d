import Accelerator
import ArgumentParser

/// `--accel`: `kvm`, and how its dirty tracking is made.
struct AcceleratorOption: Sendable {
    var dirtyTracking = DirtyTrackingChoice.automatic

    init() {}

    init(_ text: String) throws {
        let fields = text.split(separator: ",", omittingEmptySubsequences: false)
        guard fields.first == "kvm" else {
            throw ValidationError("accelerator '\(fields.first ?? "")' is unknown; possible is kvm")
        }
        var tracking: Substring?
        var entries: Int?
        for option in fields.dropFirst() {
            let parts = option.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            switch (parts[0], parts.count == 2 ? parts[1] : "") {
            case ("dirty-tracking", let value):
                guard ["auto", "log", "ring"].contains(value) else {
                    throw ValidationError("dirty-tracking '\(value)': possible are auto, log and ring")
                }
                tracking = value
            case ("dirty-ring-size", let value):
                guard let count = Int(value), count > 0, count.nonzeroBitCount == 1 else {
                    throw ValidationError(
                        "dirty-ring-size '\(value)': a power of two of entries is expected, such as 4096")
                }
                entries = count
            default: throw ValidationError("kvm has no option '\(option)'; it has dirty-tracking and dirty-ring-size")
            }
        }
        switch (tracking, entries) {
        case ("log", .some): throw ValidationError("dirty-ring-size: with dirty-tracking=log there is no ring")
        case ("log", nil): dirtyTracking = .log
        case ("ring", let count): dirtyTracking = .ring(entryCount: count)
        case (_, .some(let count)): dirtyTracking = .ring(entryCount: count)
        default: dirtyTracking = .automatic
        }
    }
}
