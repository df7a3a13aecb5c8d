/// A device whose state travels as one section of the migration stream.
///
/// A device without state has a section too, with an empty body: so both sides know that both have the device.
public protocol MigratableDevice: AnyObject, Sendable {
    /// The section's name in the stream, such as `godwit/uart`.
    var sectionName: String { get }
    /// Tells devices of one kind apart; 0 for the first.
    var instance: UInt32 { get }
    /// The version of the layout that `saveState()` writes, and the only one that `loadState(_:version:)` reads.
    var stateVersion: UInt32 { get }

    /// The state, in the layout documented at the device. Call it while no vCPU runs.
    func saveState() -> [UInt8]

    /// Replaces the state by a saved one, and tells the device's delegates what follows from it (interrupt levels).
    ///
    /// Load interrupt controllers before devices, so that a level announced here is no new edge for them.
    ///
    /// - Throws: `DeviceStateError` when the version is unknown, the length is wrong or a field is impossible; the
    ///   device is then unchanged.
    func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError)
}

/// Why a device refused a state section; its description is one sentence.
public struct DeviceStateError: Error, Equatable, CustomStringConvertible {
    /// What is wrong with the section.
    public enum Reason: Equatable, Sendable {
        /// The section has a version other than the one this Godwit reads.
        case version(found: UInt32, known: UInt32)
        /// The body ends inside the named field.
        case truncated(field: String, bytes: Int)
        /// The body goes on after the last field.
        case trailing(bytes: Int, expected: Int)
        /// The named field has a value that the device can never have.
        case impossible(field: String, value: UInt64)
    }

    /// The name of the section.
    public let section: String
    /// The instance of the section.
    public let instance: UInt32
    /// What is wrong with it.
    public let reason: Reason

    public var description: String {
        let what =
            switch reason {
            case .version(let found, let known):
                "version \(found) is not known, this Godwit reads version \(known); use the same Godwit on both sides"
            case .truncated(let field, let bytes):
                "the state ends after \(bytes) bytes, inside the field \(field)"
            case .trailing(let bytes, let expected):
                "the state has \(bytes) bytes where \(expected) are expected"
            case .impossible(let field, let value):
                "the field \(field) has the impossible value \(value)"
            }
        return "section \(section) instance \(instance): \(what)"
    }
}
